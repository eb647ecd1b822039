"""From a folder of captioned pictures to batches: scanning, buckets, pictures as tensors, the cache."""
