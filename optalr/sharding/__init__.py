"""Arrays over a mesh of devices: who takes which root."""
