"""What will be written, before any byte is: Options, Plan and its Builder, chunks, how exact it will be."""
