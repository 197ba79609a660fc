"""How the tables came to be, one step a file, for Alembic. A step that was released is never changed."""
