"""x @ weight.T + bias on CUDA, a row's bits whatever rows are computed with it; dense_linear binds it."""
