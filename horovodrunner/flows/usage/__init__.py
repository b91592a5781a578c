"""What ranks and their hosts use of processors, memory and GPUs, back."""
