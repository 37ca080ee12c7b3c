"""One way of moving slots between memory and a file system per module; `base` says what they have in common."""
