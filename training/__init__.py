"""From labelled crops to an ensemble folder that `inference` opens. Imports `inference`, never the other way round."""
