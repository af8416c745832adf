"""Stored bytes to crops: where a crop lies, and the decoders that cut it out."""
