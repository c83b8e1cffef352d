// QuPath 0.4 and later: sends a crop around each selected object to `python -m inference serve`, and classifies it.
// Automate > Script editor > Run. Change SERVER where the server runs on another machine.
import groovy.json.JsonOutput
import groovy.json.JsonSlurper
import java.net.http.*
import javax.imageio.ImageIO
import qupath.lib.common.ColorTools
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.RegionRequest

def SERVER = "http://127.0.0.1:4743/score", SIDE = 128, MPP = 0.25, AT_ONCE = 256
def server = getCurrentServer(), path = server.getPath()
double downsample = MPP / server.getPixelCalibration().getAveragedPixelSizeMicrons()
if (Double.isNaN(downsample)) { print "The image has no pixel size in µm; set it first (Image tab)"; return }
if (Math.abs(downsample - 1) < 0.1) downsample = 1  // the scanner's own pixels, as the networks were trained on
int side = Math.round(SIDE * downsample)
for (objects in (getSelectedObjects().findAll { it.hasROI() } as List).collate(AT_ONCE)) {
    def images = objects.collect {
        int x = Math.round(it.getROI().getCentroidX() - side / 2), y = Math.round(it.getROI().getCentroidY() - side / 2)
        def bytes = new ByteArrayOutputStream()
        ImageIO.write(server.readRegion(RegionRequest.createInstance(path, downsample, x, y, side, side)), "PNG", bytes)
        bytes.toByteArray().encodeBase64().toString()
    }
    def request = HttpRequest.newBuilder(URI.create(SERVER)).header("Content-Type", "application/json")
        .POST(HttpRequest.BodyPublishers.ofString(JsonOutput.toJson([mpp: MPP, images: images]))).build()
    def answer = new JsonSlurper().parseText(HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString()).body())
    if (answer.error) { print answer.error; return }
    objects.eachWithIndex { object, n ->
        def one = answer.answers[n]
        if (one.error) { print "${object.getID()}: ${one.error}"; return }
        boolean atypical = one["class"] == "atypical"
        object.setPathClass(PathClass.fromString(atypical ? "Atypical mitosis" : "Normal mitosis", atypical ? ColorTools.packRGB(213, 94, 0) : ColorTools.packRGB(0, 158, 115)))
        object.getMeasurementList().put("P(atypical)", one.p_atypical as double)
    }
    fireHierarchyUpdate()
}
