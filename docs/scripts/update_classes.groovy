// QuPath 0.4 and later: gives the objects that are open the classes and measurements of those in FILE with the same id.
// Without it, dragging FILE onto the image adds the classified objects beside the old ones.
import qupath.lib.io.PathIO

def FILE = new File("case-7-classes.geojson")
def byId = PathIO.readObjects(FILE).collectEntries { [it.getID(), it] }
def known = getAllObjects(false).findAll { byId.containsKey(it.getID()) }
known.each {
    def scored = byId[it.getID()]
    it.setPathClass(scored.getPathClass())
    it.getMeasurementList().putAll(scored.getMeasurementList())
}
fireHierarchyUpdate()
print "${known.size()} of ${byId.size()} objects updated"
