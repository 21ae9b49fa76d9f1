"""What is fast or long, one file a framework, reached only from its tab."""
