// Runs a script as QuPath does, with its default imports, on stand-ins: groovy -cp FOLDER run.groovy SCRIPT STATE.json
// STATE: slide, server (class of the one around its own, or null), features, selected (ids), answers (of dialogs), kept (preferences); written back with what changed.
import groovy.json.JsonOutput
import groovy.json.JsonSlurper
import org.codehaus.groovy.control.CompilerConfiguration
import org.codehaus.groovy.control.customizers.ImportCustomizer
import qupath.fx.dialogs.Dialogs
import qupath.lib.gui.prefs.PathPrefs
import qupath.lib.gui.scripting.QPEx
import qupath.lib.io.PathIO

def file = new File(args[1]), state = new JsonSlurper().parseText(file.getText("UTF-8"))
def uri = state.slide.contains(":") ? new URI(state.slide) : new File(state.slide).toURI()
def opened = new Expando(getURIs: { [uri] }, getPath: { "OpenslideImageServer: ${uri}".toString() })
QPEx.server = state.server ? this.class.classLoader.loadClass("qupath.lib.images.servers.${state.server}").newInstance(opened) : opened
QPEx.hierarchy.addObjects(state.features.collect { PathIO.read(it) })
QPEx.hierarchy.selectionModel.setSelectedObjects(QPEx.hierarchy.objects.findAll { it.getID().toString() in state.selected }, null)
Dialogs.answers = state.answers
PathPrefs.kept = state.kept

def imports = new ImportCustomizer()
imports.addImports("qupath.lib.common.GeneralTools", "qupath.fx.dialogs.Dialogs", "qupath.lib.gui.scripting.QPEx")
imports.addStaticStars("qupath.lib.gui.scripting.QPEx")
def configuration = new CompilerConfiguration()
configuration.addCompilationCustomizers(imports)
new GroovyShell(this.class.classLoader, new Binding(), configuration).evaluate(new File(args[0]))

state.features = QPEx.hierarchy.objects.collect { PathIO.feature(it) }
state.selected = QPEx.getSelectedObjects().collect { it.getID().toString() }
file.setText(JsonOutput.toJson(state + [kept: PathPrefs.kept, shown: Dialogs.shown, updates: QPEx.updates]), "UTF-8")
