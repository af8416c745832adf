"""Batches: loaders whose sizes change between passes, the order of images, augmentation, normalization."""
