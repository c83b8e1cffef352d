// Stand-in for qupath.lib.common.GeneralTools (QuPath 0.6): toPath is null for what is no file.
package qupath.lib.common

import java.nio.file.Path
import java.nio.file.Paths

class GeneralTools {
    static Path toPath(URI uri) { uri.getScheme() == "file" ? Paths.get(uri) : null }
}
