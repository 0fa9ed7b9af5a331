"""Will it fit, and how fast could it be: told from headers and data sheets, before anything is loaded."""
