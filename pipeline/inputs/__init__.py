"""What comes in: files of any format, their columns, and the rows and conversations in them."""
