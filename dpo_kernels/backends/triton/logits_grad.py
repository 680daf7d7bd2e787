"""Stage 3 in Triton"""
