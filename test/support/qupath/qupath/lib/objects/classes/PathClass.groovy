// Stand-in for qupath.lib.objects.classes.PathClass (QuPath 0.6): one instance a name, and the first colour stays.
package qupath.lib.objects.classes

class PathClass {
    private static final Map<String, PathClass> known = [:]
    final String name
    final List<Integer> color

    private PathClass(String name, List<Integer> color) {
        this.name = name
        this.color = color
    }

    static PathClass fromString(String name, List<Integer> color) {
        if (!known.containsKey(name)) known[name] = new PathClass(name, color)
        known[name]
    }

    String toString() { name }
}
