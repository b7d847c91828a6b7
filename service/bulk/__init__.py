"""Work on many images without a server: their vectors into files, and from files into a gallery."""
