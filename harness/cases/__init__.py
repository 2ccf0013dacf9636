"""What is asked: the case line, and everything that draws one or makes its inputs."""
