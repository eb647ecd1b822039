"""Generation: jobs, denoising, pictures that carry their settings."""
