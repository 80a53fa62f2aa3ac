"""Parts of `build_emoji.py`: packages, concepts and splits, pictures and clips, manifests, notice."""
