"""Programs that run in processes of their own: the clients, and a server in another virtual environment."""
