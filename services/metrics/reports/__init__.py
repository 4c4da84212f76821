"""Reports, charts and tables: made from messages alone, in a process of their own."""
