"""Properties of the whole public surface, on drawn inputs: values against a truth of their own, and relations between calls."""
