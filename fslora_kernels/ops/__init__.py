"""One folder per operation: reference, interface, autograd, one file per backend, shapes."""
