"""Parts of ``benchmarks/untuned.py``: problems, methods, runs, and what is made of them."""
