// Stand-in for qupath.lib.objects.hierarchy.PathObjectHierarchy and its selection model (QuPath 0.6).
package qupath.lib.objects.hierarchy

import qupath.lib.objects.PathObject

class PathObjectHierarchy {
    List<PathObject> objects = []
    final selectionModel = new Selection()

    Selection getSelectionModel() { selectionModel }
    boolean addObjects(Collection<? extends PathObject> pathObjects) { objects.addAll(pathObjects) }
    void removeObjects(Collection<? extends PathObject> pathObjects, boolean keepChildren) { objects.removeAll(pathObjects) }

    static class Selection {
        private Set<PathObject> selected = new LinkedHashSet()
        Set<PathObject> getSelectedObjects() { Collections.unmodifiableSet(selected) }
        void setSelectedObjects(Collection<? extends PathObject> pathObjects, PathObject mainSelectedObject) {
            selected = new LinkedHashSet(pathObjects)
        }
    }
}
