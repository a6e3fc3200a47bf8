"""Captioned images: where they lie, which caption is read, and the batches of a run."""
