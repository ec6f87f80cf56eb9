"""clawrl: serve a language-model agent, learn from what follows its replies, swap the better weights in."""

__version__ = "0.1.0"
