"""Device meshes, the table that assigns weights and activations to them, and plans for TPU slices."""
