"""Several engines behind one address, on Ray Serve: what each holds, where a request goes, what becomes of the lost."""
