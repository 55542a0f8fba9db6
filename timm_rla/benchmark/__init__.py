"""What networks cost beside each other: images per second and memory, as ratios within one run."""
