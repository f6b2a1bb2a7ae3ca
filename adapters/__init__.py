"""What touches a foreign library, a concern a module."""
