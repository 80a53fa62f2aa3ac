"""Parts of `build_pictures.py`: further packages, their labels and licences, rasterising, and what looks alike."""
