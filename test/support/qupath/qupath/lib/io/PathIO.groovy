// Stand-in for qupath.lib.io.PathIO with PathObjectTypeAdapters and ROITypeAdapters (QuPath 0.6): coordinates are
// written with two decimals.
package qupath.lib.io

import groovy.json.JsonOutput
import groovy.json.JsonSlurper
import qupath.lib.geom.Point2
import qupath.lib.objects.PathObject
import qupath.lib.objects.classes.PathClass
import qupath.lib.roi.interfaces.ROI

class PathIO {
    enum GeoJsonExportOptions { PRETTY_JSON, EXCLUDE_MEASUREMENTS, FEATURE_COLLECTION }

    static void exportObjectsAsGeoJSON(File file, Collection<? extends PathObject> objects, GeoJsonExportOptions... options) {
        assert GeoJsonExportOptions.FEATURE_COLLECTION in options
        file.setText(JsonOutput.toJson([type: "FeatureCollection", features: objects.collect { feature(it) }]), "UTF-8")
    }

    static Map feature(PathObject object) {
        def roi = object.getROI()
        def pairs = roi.points.collect { p -> [p.x, p.y].collect { Math.round(it * 100) / 100 } }
        def coordinates = roi.type == "Point" ? pairs[0] : roi.type == "MultiPoint" ? pairs : [pairs + [pairs[0]]]
        def properties = [objectType: object.isAnnotation() ? "annotation" : "detection"]
        if (object.name) properties.name = object.name
        if (object.pathClass) properties.classification = [name: object.pathClass.name, color: object.pathClass.color]
        if (object.measurementList.values) properties.measurements = object.measurementList.values
        if (object.metadata) properties.metadata = object.metadata
        [type: "Feature", id: object.getID().toString(), geometry: [type: roi.type, coordinates: coordinates], properties: properties]
    }

    static List<PathObject> readObjects(File file) {
        new JsonSlurper().parseText(file.getText("UTF-8")).features.collect { read(it) }
    }

    static PathObject read(Map feature) {
        def properties = feature.properties, geometry = feature.geometry, kind = properties.classification
        def pairs = geometry.type == "Point" ? [geometry.coordinates] : geometry.type == "MultiPoint" ? geometry.coordinates : geometry.coordinates[0][0..-2]
        def points = pairs.collect { new Point2(x: it[0] as double, y: it[1] as double) }
        def object = new PathObject(roi: new ROI(type: geometry.type, points: points), annotation: properties.objectType == "annotation")
        object.id = UUID.fromString(feature.id)
        object.name = properties.name
        if (kind) object.pathClass = PathClass.fromString(kind.name, kind.color)
        properties.measurements.each { name, value -> object.measurementList.put(name, value as double) }
        properties.metadata.each { name, value -> object.metadata[name] = value }
        object
    }
}
