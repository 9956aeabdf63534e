"""What an attacker learns about images from auxiliary ones."""
