"""Distributed training of class-conditional GANs whose discriminator also classifies."""

__version__ = "0.1.0"
