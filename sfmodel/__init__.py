"""A lean Wan2.1-compatible model and trainer on sfkernels."""
