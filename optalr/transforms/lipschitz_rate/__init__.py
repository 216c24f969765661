"""The learning rate as the inverse of the loss's Lipschitz constant.

``transform`` is the method, ``measuring`` says what one minibatch shows of the constant,
``constants`` which constant is in force, ``averages`` what rate follows from it, ``guards`` what
bounds that rate.
"""
