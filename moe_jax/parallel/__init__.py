"""Where arrays live and how bytes move between devices."""
