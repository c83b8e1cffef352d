// Stand-in for qupath.lib.gui.scripting.QPEx and QP (QuPath 0.6): the static methods that scripts call without a class.
package qupath.lib.gui.scripting

import qupath.lib.objects.PathObject
import qupath.lib.objects.hierarchy.PathObjectHierarchy

class QPEx {
    static server
    static PathObjectHierarchy hierarchy = new PathObjectHierarchy()
    static int updates = 0

    static getCurrentServer() { server }
    static PathObjectHierarchy getCurrentHierarchy() { hierarchy }
    static Collection<PathObject> getAllObjects(boolean includeRootObject) { new ArrayList(hierarchy.objects) }
    static Collection<PathObject> getSelectedObjects() { hierarchy.selectionModel.selectedObjects }
    static void fireHierarchyUpdate() { updates++ }
}
