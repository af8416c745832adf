"""Classifiers of torchvision, timm and transformers: as networks by name, and with their published heads."""
