"""Short programs to start from. Each is run by tests/end_to_end/test_client_examples.py."""
