// Stand-in for qupath.fx.dialogs.Dialogs (QuPath 0.5 and later; qupath.lib.gui.dialogs.Dialogs before): answers what
// the test wants, and keeps what was shown.
package qupath.fx.dialogs

class Dialogs {
    static List<String> shown = []
    static Map<String, String> answers = [:]

    static <T> T showChoiceDialog(String title, String message, Collection<T> choices, T defaultChoice) {
        shown << "choice: ${choices.join(', ')}; ${defaultChoice}".toString()
        answers.containsKey("choice") ? answers.choice : defaultChoice
    }

    static String showInputDialog(String title, String message, String initialInput) {
        shown << "input".toString()
        answers.input
    }

    static void showErrorMessage(String title, String message) { shown << "error: ${message}".toString() }
    static void showInfoNotification(String title, String message) { shown << "info: ${message}".toString() }
}
