// Stand-in for qupath.lib.gui.prefs.PathPrefs (QuPath 0.6), which keeps preferences over restarts.
package qupath.lib.gui.prefs

class PathPrefs {
    static Map<String, String> kept = [:]

    static StringProperty createPersistentPreference(String name, String defaultValue) { new StringProperty(name, defaultValue) }

    static class StringProperty {
        private final String name, fallback
        StringProperty(String name, String fallback) { this.name = name; this.fallback = fallback }
        String get() { kept.containsKey(name) ? kept[name] : fallback }
        void set(String value) { kept[name] = value }
    }
}
