"""Pictures and clips to arrays and back, and the sizes that they get (Pillow only)."""
