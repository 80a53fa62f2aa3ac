"""Device meshes, and the table that lays weights and activations out on them."""
