"""lnsdeploy: train, emulate bit for bit and export neural networks for log-domain hardware."""

__version__ = "0.1.0"
