"""The persist stage: commits frames to HDF5 shards, seals them, and reads them back."""
