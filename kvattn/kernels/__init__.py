"""What is fast or long, one folder a framework, reached only from its tab and its layers."""
