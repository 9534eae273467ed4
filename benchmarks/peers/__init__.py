"""What the project is compared with: one small adapter per peer."""
