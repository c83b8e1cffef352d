// QuPath 0.4 and later: classifies the mitotic figures of the open slide. Automate > Script editor > Run.
//
// Takes the selected objects of the class, or those in selected outlines, or, with nothing selected, those of the whole
// image. No image leaves QuPath: `slides` reads the slide's own file. The command is asked for once: the folder where
// ./build.sh was run, the program midog-lora, or `docker run --rm IMAGE`. To be asked again, set ASK_AGAIN to true.
import qupath.lib.gui.prefs.PathPrefs
import qupath.lib.io.PathIO
import qupath.lib.objects.PathObjects
import qupath.lib.roi.ROIs
import java.nio.file.Files

def CLASS = null  // of the objects to classify, such as "Mitosis"; null: asks
def OPTIONS = []  // more options of `slides`, such as ["--device", "cuda"]
boolean ASK_AGAIN = false
def TITLE = "Mitotic figures"

// the slide's file
def server = getCurrentServer()
def files = server.getURIs().collect { GeneralTools.toPath(it) }.findAll { it != null }
def isTransformed = { Class type ->  // rotated, cropped, ... with the URIs of the image below; by name, for QuPath before 0.6 lacks the second
    type != null && (type.getSimpleName() in ["TransformingImageServer", "TiledTransformingImageServer"] || call(type.getSuperclass()))
}
if (files.size() != 1 || isTransformed(server.getClass()) || server.getPath().contains("--no-crop")) {
    Dialogs.showErrorMessage(TITLE, "The open image is not one file of this computer, opened as it is; expected a slide on disk")
    return
}
def slide = files[0].toFile().getAbsoluteFile()

// the objects
def kindOf = { it.getPathClass() == null ? "Unclassified" : it.getPathClass().toString() }
def all = getAllObjects(false).findAll { it.hasROI() && (it.isAnnotation() || it.isDetection()) }
def kinds = all.collect(kindOf).unique().sort()
def kind = CLASS
if (kind == null && kinds) {
    def likely = kinds.find { it.toLowerCase().startsWith("mitosis") || it.toLowerCase().startsWith("mitotic") }
    kind = Dialogs.showChoiceDialog(TITLE, "Class of the objects to classify", kinds, likely ?: kinds[0])
    if (kind == null) return
}
def selected = getSelectedObjects() as List
def chosen = selected.findAll { kindOf(it) == kind && it.hasROI() }
def outlines = selected.findAll { it.hasROI() && it.getROI().isArea() }
if (!chosen) {
    chosen = all.findAll { one ->
        def roi = one.getROI()
        kindOf(one) == kind && (!selected || outlines.any { it.getROI().contains(roi.getCentroidX(), roi.getCentroidY()) })
    }
}
if (!chosen) {
    def where = selected ? "in the selected outlines" : "on this slide"
    Dialogs.showErrorMessage(TITLE, "No objects of class ${kind} ${where}; expected some, found the classes ${kinds.join(', ')}".toString())
    return
}

// the command
def kept = PathPrefs.createPersistentPreference("midogLoraCommand", "")
if (ASK_AGAIN || !kept.get()) {
    def given = Dialogs.showInputDialog(TITLE, "The folder of midog-lora, its program, or: docker run --rm IMAGE", kept.get() ?: "")
    if (!given) return
    kept.set(given.trim())
}
def folder = File.createTempDir()
def found = new File(folder, "found.geojson"), scored = new File(folder, "scored.geojson")
def given = new File(kept.get()), words = kept.get().split(/\s+/) as List
def places = [slide, folder].collect { it.getAbsolutePath() }
def command = given.isDirectory() ? [new File(given, ".venv/bin/python").getPath(), "-m", "inference"] : given.exists() ? [given.getPath()] : words
if (words[0] in ["docker", "podman"] && !given.exists()) {  // paths as they are in the container, where each folder is mounted
    def mounts = ["-v", "${slide.getParent()}:/slides:ro".toString(), "-v", "${folder}:/exchange".toString()]
    def user = []  // the image's own user has no access to the temporary folder
    if (System.getProperty("os.name") == "Linux" && !words.any { it.startsWith("--user") || it.startsWith("-u") }) {
        def (uid, gid) = ["unix:uid", "unix:gid"].collect { Files.getAttribute(folder.toPath(), it) }
        user = (words[0] == "podman" && uid ? ["--userns=keep-id"] : []) + ["--user", "${uid}:${gid}".toString()]
    }
    command = words[0..-2] + user + mounts + words[-1..-1]
    places = ["/slides/${slide.getName()}".toString(), "/exchange"]
}
command += ["slides", "${places[1]}/found.geojson".toString(), "--slide", places[0], "--output", "${places[1]}/scored.geojson".toString()] + OPTIONS

try {
    PathIO.exportObjectsAsGeoJSON(found, chosen, PathIO.GeoJsonExportOptions.FEATURE_COLLECTION)
    def last = "", code = -1, process = null
    try {
        process = new ProcessBuilder(command*.toString()).directory(given.isDirectory() ? given : folder).redirectErrorStream(true).start()
        process.getInputStream().eachLine { if (it.trim()) { println it; last = it } }
        code = process.waitFor()
    } catch (IOException error) {
        last = error.getMessage()
        kept.set("")  // it is asked for again
    } finally {
        if (process != null) process.destroy()  // where the script is stopped
    }
    if (!(code in [0, 3])) {
        Dialogs.showErrorMessage(TITLE, last ?: "it ended with exit code ${code}; see the log".toString())
        return
    }

    // back to the open objects: by id, or by place where an id stands for several
    def results = PathIO.readObjects(scored)
    def once = { objects -> objects.groupBy { it.getID() }.findAll { it.value.size() == 1 }.collectEntries { [it.key, it.value[0]] } }
    def mine = once(chosen), byId = once(results)
    def cell = { x, y -> [Math.round(x * 50), Math.round(y * 50)] }
    def byPlace = results.groupBy { cell(it.getROI().getCentroidX(), it.getROI().getCentroidY()) }
    def at = { x, y ->  // the file has two decimals, so a place may have moved into the next cell
        def (a, b) = cell(x, y)
        [0, -1, 1].collectMany { i -> [0, -1, 1].collectMany { j -> byPlace[[a + i, b + j]] ?: [] } }.find { true }
    }
    int done = 0, atypical = 0
    def left = [], gone = [], fresh = []
    def count = { done++; if (kindOf(it) == "Atypical mitosis") atypical++ }
    chosen.each { object ->
        def roi = object.getROI()
        if (roi.isPoint() && roi.getNumPoints() > 1) {  // each point gets a class of its own, so each becomes an object
            def (known, unknown) = roi.getAllPoints().split { at(it.getX(), it.getY()) != null }
            def points = known.collect { at(it.getX(), it.getY()) }.unique()
            if (!points) { left << object; return }
            points.each(count)
            points.each { it.setName(object.getName()) }
            fresh.addAll(points)
            gone << object
            if (unknown) {
                def rest = PathObjects.createAnnotationObject(ROIs.createPointsROI(unknown, roi.getImagePlane()), object.getPathClass())
                rest.setName(object.getName())
                fresh << rest
                left << rest
            }
            return
        }
        def result = mine.containsKey(object.getID()) ? byId[object.getID()] : at(roi.getCentroidX(), roi.getCentroidY())
        if (result == null) { left << object; return }
        object.setPathClass(result.getPathClass())
        object.getMeasurementList().putAll(result.getMeasurementList())
        if (object.metaClass.respondsTo(object, "getMetadata")) object.getMetadata().putAll(result.getMetadata())  // QuPath 0.5
        count(object)
    }
    if (gone) getCurrentHierarchy().removeObjects(gone, true)
    if (fresh) getCurrentHierarchy().addObjects(fresh)
    getCurrentHierarchy().getSelectionModel().setSelectedObjects(left, null)
    fireHierarchyUpdate()
    def rest = left ? "; what could not be scored is selected, and the log says why" : ""
    Dialogs.showInfoNotification(TITLE, "${done} mitotic figures, ${atypical} atypical${rest}".toString())
} finally {
    folder.deleteDir()
}
