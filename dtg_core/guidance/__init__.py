"""Dense teacher guidance, one file per idea of the paper; the functions take and return tensors."""
