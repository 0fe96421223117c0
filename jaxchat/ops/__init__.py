"""Operations that have kernels."""
